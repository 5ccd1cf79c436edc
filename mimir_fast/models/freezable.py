"""What can be compiled twice: once to train its weights, once for attacks, to which they are constants."""


class Freezable:
    """Base of layers and models that torch.compile may compile."""

    frozen = False
    """Set while an attack runs on what is compiled, see attacks/no_trace.py."""

    def branch_on_frozen(self) -> None:
        """For `forward`: torch.compile guards on what is branched on, so what is frozen gets a graph of its own."""
        if self.frozen:
            pass

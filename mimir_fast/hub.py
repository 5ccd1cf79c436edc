"""Models on the Hugging Face Hub: put there from a run, taken from there, with a model card.

python -m mimir_fast.hub runs/digits/pgd_vit_nano --output hub/robust_digits     # look at it first
python -m mimir_fast.hub runs/digits/pgd_vit_nano --repo_id you/robust_digits    # after `hf auth login`

    from mimir_fast.hub import HubClassifier
    model = HubClassifier.from_pretrained("you/robust_digits")    # or a local folder; a Classifier in eval mode

A folder holds model.safetensors (which --init and --checkpoint of our commands take as it is), config.json (without any
path of the machine it was trained on) and README.md, the card.
"""

from mimir_fast.hub_models import HubClassifier as HubClassifier
from mimir_fast.hub_models import HubMaskedModel as HubMaskedModel


def main() -> None:
    """The command: publish what the line names."""
    from mimir_fast import publish  # reads a command line, which loading a model does not need

    publish.main()


if __name__ == "__main__":
    from mimir_fast.cli import run

    run(main)

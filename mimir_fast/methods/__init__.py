"""Methods: each turns a batch into {"loss": …, other scalars}; none owns a loop, an optimiser or a device."""

"""Pictures of a frozen encoder, one file each; see `mimir_fast.probing.picture`."""

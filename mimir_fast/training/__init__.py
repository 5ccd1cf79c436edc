"""The one training loop and its parts; pre-training and fine-tuning are tasks of it."""

"""Whole experiments in one command: several runs, one table. No training or attack code of their own lives here."""

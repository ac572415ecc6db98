"""What a pass that plans stands on: where the sequence lies, what moves cost, how a site is run."""

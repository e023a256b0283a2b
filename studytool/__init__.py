"""Compare fine-tuned video networks on subtomograms."""

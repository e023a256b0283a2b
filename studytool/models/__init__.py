"""Video networks made fit for subtomograms: backbones, what they start from, and what of them is trained."""

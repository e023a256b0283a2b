"""Pre-training on clips, generated or from a folder of labelled videos: features of motion where no network reaches."""

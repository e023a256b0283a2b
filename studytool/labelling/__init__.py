"""What `studytool predict` writes: the tables that came in with a label for every particle, and features.

labels.py    probabilities -> class, number, probability, entropy; what is rejected
star.py      a STAR file with these columns added, everything else as it was
tables.py    CSV for any source, Dynamo tables, features as .npz or .parquet
request.py   what to label and write; what is refused before the work
label.py     the whole command: which network, which source, what is done to its volumes, what is written
"""

"""Stage 1 over a whole data set, into a feature store: resumable, on one machine or a Ray cluster."""

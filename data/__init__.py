"""What reads and writes the dataset format; one folder a dataset."""

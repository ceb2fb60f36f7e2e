"""What a run did, as pictures: read off its records, drawn by matplotlib (the extra `plot`)."""

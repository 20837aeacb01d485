"""A benchmark for a person: pictures, and one page that opens without a network."""

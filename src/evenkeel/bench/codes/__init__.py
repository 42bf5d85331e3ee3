"""`evenkeel bench codes`: the error of a mean against the bits that it takes."""

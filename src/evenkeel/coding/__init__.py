"""Holds codes that answer from some replies (`code`, `answers/`) and that give the mean from one sum (`sum_code`, `sums/`)."""

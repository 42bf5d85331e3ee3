"""The idea: answers from some of the replies (`code`, `answers/`), and the mean from one sum (`sum_code`, `sums/`)."""

"""Holds what answers from some of the replies (`code`, `answers/`), and what makes a mean from one sum (`sum_code`)."""

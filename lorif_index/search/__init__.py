"""Search: a question put to the rows; coarse proposals, exact scores, and what was missed."""

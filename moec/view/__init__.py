"""View: a program as a page to look at."""

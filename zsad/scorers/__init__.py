"""Zero- and few-shot scorers: one folder per method, with its settings and a module that turns features into scores."""

"""From finished runs to one page: what is read, what is drawn, how it looks."""

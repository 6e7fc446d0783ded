"""Judges that answer in words: their templates, what their answers say, and preferences made of many answers."""

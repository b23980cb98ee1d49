"""A page in the browser: clean the features of one's own photos, and look at them. Needs the extra `app`."""

"""A browser page that denoises the features of your photos and compares them. Needs the extra `app`."""

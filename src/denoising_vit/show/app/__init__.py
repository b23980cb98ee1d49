"""A browser page that denoises the features of photos and compares them. Needs the extra `app`."""

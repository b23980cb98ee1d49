"""Features of pictures larger than a backbone's input, tile by tile."""

"""All that can be prepared for a backbone before it is used, made by one command for a list of backbones."""

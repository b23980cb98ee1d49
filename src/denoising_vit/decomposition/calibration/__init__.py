"""The artifact of a backbone, found once from a few dozen photos, and how far it can be trusted."""

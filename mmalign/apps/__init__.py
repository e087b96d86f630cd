"""The annotation apps: pages on which people judge pairs of images and texts, and the server of these pages."""

"""Small helpers: secrets and how they are masked, loggers, lazy names, text, SVG, access to foreign objects."""

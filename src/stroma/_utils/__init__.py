"""Small helpers: masked secrets, loggers, lazy names, text, SVG, access to foreign objects."""

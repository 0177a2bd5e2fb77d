"""Small helpers: lazy names, text, SVG, access to foreign objects."""

"""`specvlm caption`: from the settings of a start to the last row."""

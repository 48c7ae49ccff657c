"""The nouns on any function: `zoft.minimize`, its ask/tell form, and attacks on image classifiers."""

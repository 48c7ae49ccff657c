"""The nouns on any function: `zoft.minimize`, its ask/tell form, and what they are made of."""

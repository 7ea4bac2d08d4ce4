"""The demo model's world: rendered landscapes, their captions, and what judges pictures of them."""

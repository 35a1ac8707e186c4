"""`covae demo`: the main job from data to a page of pictures, each step reused if it is there."""

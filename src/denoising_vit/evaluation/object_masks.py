"""What the numbers in masks of objects may be, whatever is judged by them."""

from __future__ import annotations

#: The object in masks of 0 and 255 (DAVIS 2016); where objects are numbered (DAVIS 2017), what belongs to none.
WHITE = 255

#: Most objects that a mask may number; higher numbers are shades of gray.
MAX_OBJECTS = 50

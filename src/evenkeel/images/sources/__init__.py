"""Where a user's images come from: one file per form, each an `ImageSource`."""

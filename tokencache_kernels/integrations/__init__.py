"""Other people's libraries; each is imported only by the subpackage that bears its name."""

"""Models of other libraries; each library is imported only by the subpackage that bears its name.

``step_carrier`` works on any model and imports none.
"""

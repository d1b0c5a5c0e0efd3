"""Models of other libraries; each library is imported only by the subpackage that bears its name.

``step_carrier`` and ``calibration`` work on any model and import none.
"""

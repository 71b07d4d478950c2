"""Object detection with a YOLO of the package ultralytics, in float and in int8."""

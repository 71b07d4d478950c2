"""Text recognition and text detection on handwritten digits, in float and in int8."""

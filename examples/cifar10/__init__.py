"""ResNet-20 and MobileNetV2 for int8, on photographs of 32x32."""

"""Drawing of people as surveillance cameras see them: the numbers, the body, the scene and the camera."""

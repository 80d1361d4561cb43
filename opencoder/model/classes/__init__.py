"""The large-label-space output layer: classes split over ranks, full, random or KNN softmax over them."""

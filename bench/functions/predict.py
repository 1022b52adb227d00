"""A prediction with pandas and scikit-learn: what takes a second to import and a millisecond to run."""

import json

import numpy as np
import pandas as pd
from sklearn.linear_model import LinearRegression

# Width of an iris petal by its length, both in centimetres: the least-squares line through Fisher's 150 flowers.
MODEL = LinearRegression()
MODEL.coef_ = np.array([0.41575542])
MODEL.intercept_ = -0.36307552


def handler(event, context):
    asked = json.loads(event["body"])
    petals = pd.DataFrame({"length": asked["lengths"]})
    petals["width"] = MODEL.predict(petals[["length"]].to_numpy())
    return {"request": asked["request"], "widths": petals["width"].round(3).tolist()}

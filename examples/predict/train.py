#!/usr/bin/env python3
"""Trains the model of this example on iris.csv and writes model.joblib.

Run it with the packages of examples/science: scikit-learn reads models of its own version.
"""

from pathlib import Path

import joblib
import pandas
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).parent


def main():
    table = pandas.read_csv(HERE / "iris.csv")
    measures, species = table.drop(columns="species"), table["species"].astype(object)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    scores = cross_val_score(model, measures, species, cv=5)
    model.fit(measures, species)
    joblib.dump(model, HERE / "model.joblib")
    print(f"accuracy {scores.mean():.3f} in five-fold cross-validation on {len(table)} flowers")


if __name__ == "__main__":
    main()

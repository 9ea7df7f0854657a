#!/usr/bin/env bash
# Makes .trackers/: an environment on top of .venv with the `mlflow` and `trackio` extras. 150 MB, a minute.
exec bash "$(dirname "$0")/../../install_on_top.sh" .trackers "MLflow and Trackio" \
  mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1 trackio==0.43.0

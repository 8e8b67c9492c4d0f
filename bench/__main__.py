"""python -m bench: the forecasters beside neuralforecast's."""

from bench.forecasting import main

if __name__ == "__main__":
    main()

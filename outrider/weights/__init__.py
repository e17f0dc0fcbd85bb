"""Moving a version of the weights from the trainer's ranks to the servers, without either side waiting."""

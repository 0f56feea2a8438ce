"""The stages of dvc.yaml, one file each: `python -m stages.NAME`.

Python imports this package before the stage's module, so the check of params.yaml below reports errors in well under
two seconds: before torch is imported.
"""

import sys

if sys.argv[0] == "-m":  # true only while Python locates the module to run, so not when tests import this package
    from pipeline.files import Files
    from pipeline.stage.params_file import ParamsError, load

    try:
        load(Files.here().params)
    except ParamsError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
